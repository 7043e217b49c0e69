"""Finding documents that say the same: the mathematics and the files of the deduplication stages.

The parts of a corpus are compared by files: each shard writes what it knows sorted by a hash, jobs
each take a range of that hash over all shards, and their results are read back shard by shard. So
a job's memory depends on the size of a shard and on how many ranges there are, not on the corpus,
but for near-duplicates: a template that is all over a corpus takes about 80 bytes for each of its
pages (`candidates.find_pairs`), and each pair that is alike about 200 in the main process.
"""
