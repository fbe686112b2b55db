"""The most that input from outside may ask for.

docs/security.md lists every limit; a test compares the two.
"""

from __future__ import annotations

MAX_CLASSES = 2**24  # a classifier of 16,777,216 classes on a ResNet-50 has 34 billion weights

# --- shards and their indices -------------------------------------------------------------------------------
MAX_TAR_HEADERS = 16  # that extend the header of one member (long names, PAX); tar programs write at most 4
MAX_TAR_HEADER_BYTES = 2**20  # of one of these; extended attributes have at most some 64 KB
MAX_NAME_BYTES = 2**12  # of a member's name: the longest path of Linux
MAX_TAR_END_BYTES = 2**24  # of zeros behind a tar's end; GNU tar writes at most 10 KB unless it is told to
MAX_EXPANSION = 100  # times the size of a compressed shard; images hardly compress, and text tenfold
MIN_EXPANDED_BYTES = 2**26  # that a compressed shard may always have, however small it is
MAX_IMAGE_BYTES = 2**28  # of an image file; a photograph of 134 million pixels as PNG has about as much
MAX_LABEL_BYTES = 2**10  # of a .cls file; a label has at most 9 digits, and space around them
MAX_SHARD_SAMPLES = 2**21  # of a shard; ImageNet-1k in a single tar has 1.3 million
MAX_INDEX_BYTES = 2**26  # of an index file; that of ImageNet-1k in a single tar has 59 MB
MAX_INDEX_BRACKETS = 2**20  # in an index file, keys included; beside the keys it has 5
MAX_KEYS_BYTES = 2**28  # of the keys of a shard, each padded to the longest: 2 million of 128 bytes
MAX_EXTENSIONS = 100  # of members that are neither images nor labels that `shards verify` counts by name
MAX_BAD_IN_A_ROW = 10_000  # images that cannot be decoded, in `access: stream`, before a reader gives up
