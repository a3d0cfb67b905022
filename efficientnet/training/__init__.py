"""A training run: its settings and recipes, the loop, augmentation, optimizers, processes, CUDA graphs, saved states
and logs.
"""
