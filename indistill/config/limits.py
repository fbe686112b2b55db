"""The most that input from outside may ask for.

docs/security.md lists every limit; a test compares the two.
"""

from __future__ import annotations

# --- images -------------------------------------------------------------------------------------------------
# Pixels of an image, the default of data.max_image_pixels: 11,585 x 11,585, more than a camera takes.
IMAGE_PIXELS = 2**27
# Scans of a progressive JPEG. Encoders write about 10; libjpeg-turbo stops its own tests at as many.
JPEG_SCANS = 500
# Longer side of an image as a multiple of the shorter one. What is longer is cut to its middle before it is
# resized for evaluation, which sees only the middle: a strip of one pixel's height would take gigabytes.
IMAGE_ASPECT = 64
