"""Labelled images: how a file becomes pixels, the data sets, shards, the order of training, batches."""
