"""The scheduler, the KV books and the workers of the real run, against a device that only takes time.

`virtual_time.py` is the clock and the event loop, `executor.py` the device, `engine.py` one engine, whose stages and
worker's thread are events, `tiers.py` what moves KV below its pools, `cluster.py` several of them behind a router.
"""
