"""Finding documents that say the same: the mathematics and the files of the deduplication stages.

The parts of a corpus are compared by files: each shard writes what it knows sorted by a hash, jobs
each take a range of that hash over all shards, and their results are read back shard by shard. So
a job's memory depends on how many ranges there are, not on the corpus.
"""
