"""From which size on which implementation is faster than those after it and plain JAX ("xla"), by kind of device.

Made by `python -m experiments.bench_ops --crossovers`, whose last line is a device's entry: bfloat16, forward alone,
dilated attention at D=16 with 4 sinks; it is taken for other types and patterns and for training too. A size is

* gated_scan: the entries of an input, B * T * C, of rows of 64 tokens or more;
* decode_attention: the entries of the keys, B * K * R * H;
* decode_attention_blocks, of chosen blocks: the entries of the keys that are read, for every head that chooses; of the
  two GPUs below it was not measured, and is the size of whole caches;
* dilated_attention: T;
* sparse_attention: T * S.

A device that is not in FASTEST takes its entry of PREDICTED, under the condition that is said there. Where it has none,
it takes what runs on it of ASSUMED, and else "xla".
"""

FASTEST: dict[str, dict[str, dict[str, int]]] = {
    "NVIDIA H200": {"gated_scan": {"mosaic_gpu": 262144}, "decode_attention": {"mosaic_gpu": 33587200},
                    "decode_attention_blocks": {"mosaic_gpu": 33587200},
                    "dilated_attention": {"mosaic_gpu": 512, "cudnn": 2048, "cudnn_masked": 32}},
    "NVIDIA H100 80GB HBM3": {"gated_scan": {"mosaic_gpu": 65536}, "decode_attention": {"mosaic_gpu": 8421376},
                              "decode_attention_blocks": {"mosaic_gpu": 8421376},
                              "dilated_attention": {"mosaic_gpu": 1024, "cudnn": 4096, "cudnn_masked": 32}},
}

# Predicted, not measured, by `python -m experiments.roofline --crossovers`: for programs that are compiled for a device
# that is elsewhere, and for one that is here after `check.check_device` has passed.
PREDICTED: dict[str, dict[str, dict[str, int]]] = {
    "TPU v5 lite": {"gated_scan": {"pallas_tpu": 16777216}, "decode_attention": {"pallas_tpu": 1048576},
                    "decode_attention_blocks": {"pallas_tpu": 1048576}, "dilated_attention": {"pallas_tpu": 512},
                    "sparse_attention": {"pallas_tpu": 4194304}},
    "TPU v5": {"gated_scan": {"pallas_tpu": 262144}, "decode_attention_blocks": {"pallas_tpu": 262144},
               "dilated_attention": {"pallas_tpu": 512}, "sparse_attention": {"pallas_tpu": 1048576}},
    "TPU v6 lite": {"gated_scan": {"pallas_tpu": 4194304}, "decode_attention_blocks": {"pallas_tpu": 33554432},
                    "dilated_attention": {"pallas_tpu": 128}, "sparse_attention": {"pallas_tpu": 4194304}},
    "TPU7x": {"gated_scan": {"pallas_tpu": 2097152}, "decode_attention_blocks": {"pallas_tpu": 262144},
              "dilated_attention": {"pallas_tpu": 512}, "sparse_attention": {"pallas_tpu": 1048576}},
}

# Assumed, not measured, of a device that is not above: the H100's sizes for what needs no Hopper GPU. They are too high
# rather than too low for a slower device, whose work takes longer beside what a kernel costs to start.
ASSUMED: dict[str, dict[str, int]] = {
    "dilated_attention": {name: FASTEST["NVIDIA H100 80GB HBM3"]["dilated_attention"][name]
                          for name in ("cudnn", "cudnn_masked")},
}
