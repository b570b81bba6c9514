"""``python -m bench.gpu``: everything that only a GPU can answer, in stages, by one command and without a network (``make gpu``).

runner.py runs commands with time limits and keeps their logs; stages.py says which; the rest are programs that stages run.
"""
