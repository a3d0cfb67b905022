"""Values that both the settings of a run and other commands accept. No torch here: the command line is made from
them.
"""

AMP = ("none", "bf16", "fp16")  # autocast, and its dtype
DEVICES = ("auto", "cpu", "cuda")
MAX_PIXELS = 178_956_970  # of an image file: more is an error, as Pillow has it
INTERPOLATIONS = ("bilinear", "bicubic")  # of images that are resized
