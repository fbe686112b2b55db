"""The most that input from outside may ask for.

docs/security.md lists every limit; a test compares the two.
"""

from __future__ import annotations

# --- text ---------------------------------------------------------------------------------------------------
MAX_LINE_CHARACTERS = 4000  # of an error message; the longest that we write, with paths, has some hundred
MAX_CONFIG_BYTES = 2**24  # of a config file; one that lists 100,000 shards one by one has 10 MB
# Values in a config with its aliases written out, where 64 characters of text count as one more: 100,000
# shards are fewer, and PyYAML takes 2 KB for each.
MAX_CONFIG_VALUES = 2**18
MAX_CONFIG_DEPTH = 64  # of mappings and lists in each other in a config; our own keys need 6
MAX_NUMBER_CHARACTERS = 100  # of a number in a config; a float with all its digits has 24

# --- numbers in a config ------------------------------------------------------------------------------------
MAX_INTEGER = 2**53  # largest that a float holds exactly, and more than any count in training
MAX_DURATION = 10**15  # epochs, steps, samples or percent; training for a year takes 10^9 steps
MAX_CLASSES = 2**24  # a classifier of 16,777,216 classes on a ResNet-50 has 34 billion weights
MAX_PIXELS_A_SIDE = 2**13  # of the networks' input: one image in float32 has 805 MB then
MAX_BATCH = 2**24  # images in an optimizer step; the largest published batches have 2^16
MAX_STREAMS = 2**20  # more than there are accelerators in any cluster
MAX_WORKERS = 2**8  # loader processes of a rank; the largest nodes have some hundred cores, and several ranks
MAX_MINUTES = 10**6  # two years; torch's time limits overflow at some hundred

# --- data ---------------------------------------------------------------------------------------------------
MAX_SHARDS = 2**20  # of one pattern with braces; the largest published data sets have 300,000
MAX_SHARDS_CHARACTERS = 2**27  # of their paths together: 1,048,576 paths of 128 characters
MAX_BRACE_DEPTH = 16  # of braces in each other
MAX_CLASS_FILE_BYTES = 2**24  # of a list of class names; a million names have 10 MB
MAX_CSV_ROWS = 2**24  # of `shards pack`; ImageNet-21k has 14 million images
MAX_CSV_LINE_CHARACTERS = 2**16  # of a line, a path and a label
MAX_MANIFEST_BYTES = (
    2**26
)  # of the manifest of stored targets; one of 300,000 shards and a million classes has 12 MB
