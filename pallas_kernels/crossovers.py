"""From which size on which implementation is faster than plain JAX ("xla"), by kind of device, as measured.

Made by `python -m experiments.bench_ops --crossovers`, whose last lines are a device's entry. A size is

* gated_scan: the entries of an input, B * T * C;
* decode_attention: the entries of the keys, B * K * R * H;
* dilated_attention: T.

A device that is not here takes "xla" everywhere.
"""

FASTEST: dict[str, dict[str, dict[str, int]]] = {}
