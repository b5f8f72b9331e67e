"""What `hf-fff bench cuda --json` tells, of figures that nobody measured."""

RATES = {"copy_gb_per_second": 2000.0, "matmul_tflops": 500.0}
TOLD = {
    "command": "cuda", "line": "hf-fff bench cuda", "cpu": "Some CPU", "torch": "2.13", "transformers": "5", "python": "3.11", "hf_fff": "0",
    "backend": "native", "date": "a day", "seconds": 77, "hidden_size": 768, "size": "bert-base", "device": "Some GPU", "rates": RATES, "rounds": 9,
    "gpu": {"name": "Some GPU", "capability": "9.0", "multiprocessors": 132, "memory_gib": 80.0, "l2_mib": 50.0, "driver": "13.0", "cuda": "13.0"},
    "failed": {"train": "it was late"}, "stopped": ["graph"],
    "rows": [
        {
            "section": "forward", "work": "131072", "dtype": "bfloat16", "left_out": {"mlp:256": "CUDA out of memory."}, "peak_mb": {},
            "seconds": {"copy": 1e-4, "dense:3072": 2.5e-3, "dense:3072 fused": 2e-3, "mlp:12": 1.5e-4, "1x11": 2.5e-4, "1x11 masked": 3e-3},
            "checks": {"1x11": {"error": 0.004, "agreeing": 0.999, "visited": 4095}, "1x11 masked": {"error": 0.01, "agreeing": 0.9, "visited": 4095}},
            "ways": {"1x11": "tiles"},
        },
        {
            "section": "backward", "work": "131072", "dtype": "bfloat16", "left_out": {}, "peak_mb": {},
            "seconds": {"dense:3072": 4e-3, "1x11": 1e-3, "1x11 routing": 5e-3, "1x11 masked": 8e-3, "1x11 masked routing": 9e-3},
            "checks": {"1x11": {"x": 0.001, "weight_in": 0.002}, "1x11 routing": {"x": 0.1}}, "ways": {"1x11": None, "1x11 routing": "dense"},
        },
        {
            "section": "model", "work": "32x128", "dtype": "bfloat16", "left_out": {}, "peak_mb": {}, "checks": {}, "ways": {},
            "seconds": {"dense": 4e-3, "8x8": 3.2e-3, "none": 3e-3, "dense graph": 2e-3, "8x8 graph": 1.8e-3, "none graph": 1e-3},
        },
        {
            "section": "train", "work": "bert-base 32x128", "dtype": "bfloat16 autocast", "left_out": {}, "checks": {}, "ways": {},
            "seconds": {"dense": 0.05, "8x8": 0.04}, "peak_mb": {"dense": 5000.0, "8x8": 4000.0},
        },
    ],
}  # fmt: skip
