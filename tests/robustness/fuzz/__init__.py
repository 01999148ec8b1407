"""A job that tries what strangers' files can do: every reader of mgq on hundred thousands of damaged and forged files.

``python -m tests.robustness.fuzz --inputs 100000 --seed 0`` repeats it to the bit. Inputs are small valid files that
are damaged with their structure in view (:mod:`tests.robustness.fuzz.mutations`) or put together anew; the loop is our
own, on ``random``, which makes thousands of inputs a second where hypothesis makes tens, and needs no state to
repeat one of them.
"""
