"""From which size on which implementation is faster than those after it and plain JAX ("xla"), by kind of device.

Made by `python -m experiments.bench_ops --crossovers`, whose last line is a device's entry: bfloat16, forward alone,
dilated attention at D=16 with 4 sinks; it is taken for other types and patterns and for training too. A size is

* gated_scan: the entries of an input, B * T * C, of rows of 64 tokens or more;
* decode_attention: the entries of the keys, B * K * R * H;
* dilated_attention: T;
* sparse_attention: T * S.

A device that is not here takes "xla" everywhere.
"""

FASTEST: dict[str, dict[str, dict[str, int]]] = {
    "NVIDIA H200": {"gated_scan": {"mosaic_gpu": 262144}, "decode_attention": {"mosaic_gpu": 33587200},
                    "dilated_attention": {"mosaic_gpu": 512, "cudnn": 2048, "cudnn_masked": 32}},
    "NVIDIA H100 80GB HBM3": {"gated_scan": {"mosaic_gpu": 65536}, "decode_attention": {"mosaic_gpu": 8421376},
                              "dilated_attention": {"mosaic_gpu": 1024, "cudnn": 4096, "cudnn_masked": 32}},
}
