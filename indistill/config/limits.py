"""The most that input from outside may ask for.

docs/security.md lists every limit; a test compares the two.
"""

from __future__ import annotations

# --- images -------------------------------------------------------------------------------------------------
MAX_IMAGE_PIXELS = 2**27  # default of data.max_image_pixels: 11,585 x 11,585, more than a camera takes
MAX_JPEG_SCANS = 500  # of a progressive JPEG; encoders write about 10, and each takes as long as an image
MAX_SCANNED_PIXELS = 2**32  # pixels times scans of a JPEG, some 10 seconds; 12 scans of 2^27 pixels fit
MAX_IMAGE_ASPECT = 64  # longer side over the shorter one; evaluation cuts a longer image to its middle

# --- remote files -------------------------------------------------------------------------------------------
MIN_FETCH_BYTES_PER_SECOND = 1000  # while a server is waited for, on average; a modem of 1995 was faster
FETCH_WINDOW_SECONDS = 60.0  # over which that average is taken
MAX_RESPONSE_HEADER_BYTES = 2**20  # of an HTTP response, redirections apart; servers send some hundred
MAX_SMALL_FILE_BYTES = 2**26  # of an index or a dataset.json; that of ImageNet-1k in a single tar has 59 MB
MAX_LOCK_SECONDS = 7200.0  # that a process waits for another one that fetches the same file

# --- between ranks ------------------------------------------------------------------------------------------
MAX_REPORT_BYTES = 2**12  # of the place that a rank publishes; it has some hundred
