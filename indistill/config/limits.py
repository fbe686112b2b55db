"""The most that input from outside may ask for.

docs/security.md lists every limit; a test compares the two.
"""

from __future__ import annotations

# --- records of a run ---------------------------------------------------------------------------------------
MAX_RECORD_BYTES = 2**24  # of a JSON record; the largest, `state.json` with 100,000 bad samples, has 4 MB
MAX_RECORD_LINE_BYTES = 2**20  # of a line of metrics.jsonl or history.jsonl; lines have some hundred bytes
MAX_RECORD_LINES_BYTES = 2**32  # of metrics.jsonl or history.jsonl; a million logged steps have 400 MB
MAX_REPORTED_BYTES = 2**26  # of metrics.jsonl in a report; 150,000 lines, of which a curve shows 1,000 points
MAX_METRIC_NAMES = 1000  # different names in metrics.jsonl; a run has some ten for each pair and loss
MAX_METRIC = 1e100  # of a loss, score or rate; float32 ends at 3e38
MAX_COUNT = 2**53  # of steps, samples, bytes or parameters: the largest that a float holds exactly
MAX_CHANNELS = 2**20  # of a layer; the widest networks have some 10,000
MAX_SECONDS = 2.5e11  # of a time in history.jsonl: the year 9892; dates end with the year 9999
MAX_STATUS_BYTES = 2**16  # of `status`: a word, and the line of an error
MAX_TARGET_RECORD_BYTES = 2**30  # of one sample; a map of 2,048 channels and 64 pixels a side has 33 MB
MAX_TEACHER_BATCH = 2**16  # images that the teacher sees at once, on one process
MAX_VIEWS = 2**20  # of an image in stored targets; more would be more than any run's epochs
MAX_STAGES = 1000  # of a network in a pruning plan or stored targets; the deepest networks have some hundred

# --- shards and their indices -------------------------------------------------------------------------------
MAX_TAR_HEADERS = 16  # that extend the header of one member (long names, PAX); tar programs write at most 4
MAX_TAR_HEADER_BYTES = 2**20  # of one of these; extended attributes have at most some 64 KB
MAX_NAME_BYTES = 2**12  # of a member's name: the longest path of Linux
MAX_TAR_END_BYTES = 2**24  # of zeros behind a tar's end; GNU tar writes at most 10 KB unless it is told to
MAX_EXPANSION = 100  # times the size of a compressed shard; images hardly compress, and text tenfold
MIN_EXPANDED_BYTES = 2**26  # that a compressed shard may always have, however small it is
MAX_IMAGE_BYTES = 2**28  # of an image file; a photograph of 134 million pixels as PNG has about as much
MAX_LABEL_BYTES = 2**10  # of a .cls or .txt file; a label has at most 9 digits or a name, and space around
MAX_LABEL_JSON_BYTES = 2**20  # of a .json file with a label; with captions and EXIF they have some 10 KB
MAX_SHARD_SAMPLES = 2**21  # of a shard; ImageNet-1k in a single tar has 1.3 million
MAX_INDEX_BYTES = 2**27  # of an index file; 2 million samples with keys of 28 characters have 117 MB
MAX_INDEX_BRACKETS = 2**20  # in an index file, keys included; beside the keys it has 5
MAX_INDEX_NUMBERS = 10_000_000  # entries of an index file, by its commas; 2 million samples have 8.4 million
MAX_KEYS_BYTES = 2**28  # of the keys of a shard, each padded to the longest: 2 million of 128 bytes
MAX_EXTENSIONS = 100  # of members that are neither images nor labels that `shards verify` counts by name
MAX_BAD_IN_A_ROW = 10_000  # images that cannot be decoded, in `access: stream`, before a reader gives up

# --- images -------------------------------------------------------------------------------------------------
MAX_IMAGE_PIXELS = 2**27  # default of data.max_image_pixels: 11,585 x 11,585, more than a camera takes
MAX_JPEG_SCANS = 500  # of a progressive JPEG; encoders write about 10, and each takes as long as an image
MAX_SCANNED_PIXELS = 2**32  # pixels times scans of a JPEG, some 10 seconds; 12 scans of 2^27 pixels fit
MAX_IMAGE_ASPECT = 64  # longer side over the shorter one; evaluation cuts a longer image to its middle

# --- remote files -------------------------------------------------------------------------------------------
MIN_FETCH_BYTES_PER_SECOND = 1000  # while a server is waited for, on average; a modem of 1995 was faster
FETCH_WINDOW_SECONDS = 60.0  # over which that average is taken
MAX_RESPONSE_HEADER_BYTES = 2**20  # of an HTTP response, redirections apart; servers send some hundred
MAX_SMALL_FILE_BYTES = 2**27  # of an index or a dataset.json, like MAX_INDEX_BYTES
MAX_LOCK_SECONDS = 7200.0  # that a process waits for another one that fetches the same file

# --- between ranks ------------------------------------------------------------------------------------------
MAX_REPORT_BYTES = 2**12  # of the place that a rank publishes; it has some hundred

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
MAX_LISTED_NAMES = 2**22  # in the folders that a pattern with * leads to; they take some 10 seconds
MAX_BRACE_DEPTH = 16  # of braces in each other
MAX_CLASS_FILE_BYTES = 2**24  # of a list of class names; a million names have 10 MB
MAX_META_BYTES = 2**20  # of meta.mat in ImageNet's development kit, which is compressed
MAX_CSV_ROWS = 2**24  # of `shards pack`; ImageNet-21k has 14 million images
MAX_ROW_GROUP_BYTES = 2**32  # of images in a Parquet file; usual groups have some hundred of them
MAX_CSV_LINE_CHARACTERS = 2**16  # of a line, a path and a label
MAX_STANDARDS_BYTES = 2**30  # of standards.safetensors; PHI-S of 4,096 channels has 134 MB
MAX_MANIFEST_BYTES = 2**26  # of stored targets; that of 300,000 shards and a million classes has 12 MB
