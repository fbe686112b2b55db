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
