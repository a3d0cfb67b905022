"""Times and bytes of a model on the machine at hand."""
