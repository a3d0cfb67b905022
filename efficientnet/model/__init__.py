"""The network: its configurations, the compound scaling they come from, its blocks, what it costs, what transfer
learning freezes.
"""
