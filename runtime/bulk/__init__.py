"""Running a method over a corpus: what is done once is never lost and never done twice.

inventory   the frozen list of images             journal     which shards are committed
pipeline    read, decode, infer, refine, encode    shards      writing the files of a shard
worker      all that does shards in one process    run         one run: begin, resume, finish
"""
