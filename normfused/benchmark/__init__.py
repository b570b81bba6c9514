"""``python -m normfused bench``: how much faster, and what does it cost? Against eager PyTorch, torch.compile and installed peers.

cases.py says what is timed, providers.py and peers.py who is timed, accuracy.py whether they are right, timing.py how, operators.py and
networks/ run it, results.py is the file that comes out, traffic.py the bytes that must move, report.py and charts.py what people read.
Only torch is needed to time; rich and matplotlib (extra ``bench``) make it readable.
"""
