"""The mirror of a run directory at a URL, `mirror: s3://bucket/run`, for nodes that share no file system.

The mirror has the names of the run directory, and `mirror.json`, which says whose it is. A thread of rank 0
makes it like the run directory after each checkpoint (uploads.py); a node that is behind gets what it lacks
(fetch.py). What is uploaded is read back and compared by size and SHA-256. `manifest.json` marks a checkpoint
of the mirror as complete: it is uploaded last, after the records that belong to the checkpoint, and deleted
first.
"""
