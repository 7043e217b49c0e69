"""Finding documents that say the same: the mathematics and the files of the
deduplication stages.

Each shard writes what it knows sorted by a hash, jobs each take a range of that hash
over all shards, and their results are read back shard by shard. So a job's memory
depends on the size of a shard and on how many ranges there are, not on the corpus; of
near-duplicates a template takes about 80 bytes for each of its pages, and each pair
that is alike about 200 in the main process.
"""
