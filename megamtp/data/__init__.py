"""From text to micro-batches, in the order in which data flows:

1. ``preprocess/``           text -> tokens, by many processes (``tokenizer.py`` names what a token is)
2. ``dataset_writer.py``     tokens -> ``PREFIX.bin`` and ``PREFIX.idx``;  ``manifest.py``: ``PREFIX.json``, how to tell
                             that they are whole;  ``merge.py``, ``inspect.py``: several into one, a look inside
3. ``indexed_dataset.py``    reads the pair;  ``stream.py``: a run of its documents as one stream of tokens
4. ``samples.py``            the stream cut into numbered samples;  ``packing.py``: or documents kept whole, whose
                             index ``index_cache.py`` keeps on disk
5. ``blend.py``              several sets of samples mixed into one order, and a place in it to resume from
6. ``loader.py``             this rank's micro-batches of the order, read ahead
7. ``datasets.py``           the config's ``data:`` section: opens and checks all of it
"""
