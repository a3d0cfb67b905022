"""One module for each command: SUMMARY, add_arguments(parser) and run(args), which import what they need when they
run.
"""
