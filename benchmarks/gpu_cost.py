"""What a step of the optimizer should cost on a GPU: bytes and FLOPs of every launch, and the times that follow. Nothing is run.

    python benchmarks/gpu_cost.py [--model 1.5B] [--gpu H200] [--rank 128]

A launch takes the longer of moving its bytes and multiplying, and some microseconds for itself. A GPU is described by the speed
of a copy, by TF32 and bf16 products, and by the shares of them that kernels are taken to reach. All of it is prediction: float32
weights and moments, every pair with B nonzero, everything that trains.
"""

import argparse
from dataclasses import dataclass

# Shares of the speeds below that are assumed: of a copy, of TF32 products, and of bf16 products by a whole training step.
ELEMENTWISE, PRODUCTS, TRAINING = 0.9, 0.5, 0.4
# Seconds that each of the many products of a step takes beside its work: its launch and its last, half-empty wave.
EACH = 3e-6


@dataclass(frozen=True)
class Gpu:
    """Bytes a second of a copy (read and written), and dense FLOPs a second of products."""

    copy: float
    tf32: float
    bf16: float


GPUS = {
    "H100": Gpu(2.9e12, 494e12, 989e12),
    "H200": Gpu(4.3e12, 494e12, 989e12),
    "A100": Gpu(1.75e12, 156e12, 312e12),
    "RTX 4090": Gpu(0.92e12, 82e12, 165e12),
}


@dataclass(frozen=True)
class Shape:
    """A decoder: its width, that of its MLP, of keys and values, its blocks and vocabulary, and whether embeddings are tied."""

    hidden: int
    inner: int
    key_value: int
    blocks: int
    vocabulary: int
    tied: bool = True

    @property
    def layers(self):
        """``(out, in)`` of the routed layers of all blocks."""
        h, i, k = self.hidden, self.inner, self.key_value
        return [(h, h), (k, h), (k, h), (h, h), (i, h), (i, h), (h, i)] * self.blocks

    @property
    def weights(self):
        return sum(out * n for out, n in self.layers)

    @property
    def others(self):
        """Elements that are not routed; biases are left out."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2) + self.hidden * (2 * self.blocks + 1)


SHAPES = {
    "0.1B": Shape(576, 1536, 192, 30, 49152),
    "0.5B": Shape(896, 4864, 128, 24, 151936),
    "1.5B": Shape(1536, 8960, 256, 28, 151936),
    "3B": Shape(2048, 11008, 256, 36, 151936),
    "8B": Shape(4096, 14336, 1024, 32, 128256, tied=False),
}


@dataclass(frozen=True)
class Cost:
    """One kind of launch in a step: bytes, FLOPs, and how many there are."""

    name: str
    bytes: float
    flops: float = 0.0
    launches: int = 1

    def floor(self, gpu):
        """Seconds at the full speed of a copy and of products."""
        return max(self.bytes / gpu.copy, self.flops / gpu.tf32)

    def prediction(self, gpu):
        """Seconds at the assumed shares of these, and what each product takes beside its work."""
        each = EACH * self.launches if self.flops else EACH
        return max(self.bytes / (ELEMENTWISE * gpu.copy), self.flops / (PRODUCTS * gpu.tf32)) + each


def step(weights, others, in_A, in_B, layers, rank, fft_wins, bits=32):
    """Return the launches of a step.

    Args:
        weights: Elements of routed weights.
        others: Elements of what is not routed.
        in_A: Elements of all A.
        in_B: Elements of all B.
        layers: The number of routed layers.
        rank: Of their pairs.
        fft_wins: Whether the weights win everywhere, or the pairs.
        bits: Of the moments of weights and of what is not routed.
    """
    pairs, flops = in_A + in_B, 2 * rank * weights
    moments, wins = (20, 16) if bits == 32 else (6, 8)
    found = [
        Cost("dB = s G A^T", 4 * (weights + in_A + in_B), flops, layers),
        Cost("dA = s B^T G", 4 * (weights + in_A + in_B), flops, layers),
        Cost("norms", 4 * (in_B + others)),
        Cost("moments and scores", moments * weights + 20 * pairs),
        Cost("winning weights", wins * weights if fft_wins else 0),
        Cost("pairs and operands", (12 if fft_wins else 24) * pairs),
        Cost("W += X Y", 8 * (weights + pairs), 2 * flops, layers),
        Cost("AdamW of the others", (28 if bits == 32 else 16) * others),
    ]
    return found if bits == 32 else [*found, Cost("8-bit moments", 8 * weights)]


def step_of(shape, rank, fft_wins, bits=32):
    """Return the launches of a step on a decoder."""
    in_A, in_B = (rank * sum(layer[side] for layer in shape.layers) for side in (1, 0))
    return step(shape.weights, shape.others, in_A, in_B, len(shape.layers), rank, fft_wins, bits)


def adamw_of(shape, gpu):
    """Return the seconds of fused AdamW at the speed of a copy."""
    return 28 * (shape.weights + shape.others) / gpu.copy


def ratio(shape, gpu, rank, fft_wins, time=Cost.prediction):
    """Return the seconds of a step over those of fused AdamW."""
    return sum(time(cost, gpu) for cost in step_of(shape, rank, fft_wins)) / adamw_of(shape, gpu)


def speed(shape, gpu, rank, fft_wins, tokens):
    """Return the tokens a second of merged MoLF as a share of full fine-tuning's, at so many tokens a step."""
    heads = shape.vocabulary * shape.hidden
    passes = 6 * (shape.weights + heads) * tokens / (TRAINING * gpu.bf16)
    adamw = adamw_of(shape, gpu)
    return (passes + adamw) / (passes + ratio(shape, gpu, rank, fft_wins) * adamw)


def print_launches(model, name, rank):
    """Print every launch of a step."""
    gpu, shape = GPUS[name], SHAPES[model]
    print(f"{model} on {name}, r = {rank}, predicted; fused AdamW {adamw_of(shape, gpu) * 1e3:.2f} ms\n")
    print("| launch | GB | GFLOP | floor, ms | predicted, ms |\n| --- | ---: | ---: | ---: | ---: |")
    for winner, fft_wins in (("FFT", True), ("LoRA", False)):
        costs = step_of(shape, rank, fft_wins)
        for cost in costs:
            times = cost.floor(gpu) * 1e3, cost.prediction(gpu) * 1e3
            print(
                f"| {cost.name} | {cost.bytes / 1e9:.1f} | {cost.flops / 1e9:,.0f} | {times[0]:.2f} | {times[1]:.2f} |"
            )
        ratios = (ratio(shape, gpu, rank, fft_wins, time) for time in (Cost.floor, Cost.prediction))
        print("| **{} wins, against fused AdamW** | | | x{:.2f} | x{:.2f} |".format(winner, *ratios))


def print_models(rank, tokens=(1024, 4096, 16384, 65536)):
    """Print the ratios of all models on all GPUs, and the speeds of training; the worse of both kinds of winners."""
    print("| predicted | FFT wins | LoRA wins | " + " | ".join(f"{n // 1024}k tokens" for n in tokens) + " |")
    print("| --- |" + " ---: |" * (2 + len(tokens)))
    for name, gpu in GPUS.items():
        for model, shape in SHAPES.items():
            ratios = [ratio(shape, gpu, rank, fft_wins) for fft_wins in (True, False)]
            speeds = [min(speed(shape, gpu, rank, wins, n) for wins in (True, False)) for n in tokens]
            cells = [f"x{x:.2f}" for x in ratios] + [f"{x:.2f}" for x in speeds]
            print(f"| {model}, {name} | " + " | ".join(cells) + " |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="1.5B", choices=SHAPES)
    parser.add_argument("--gpu", default="H200", choices=GPUS)
    parser.add_argument("--rank", type=int, default=128)
    args = parser.parse_args()
    print_launches(args.model, args.gpu, args.rank)
    print()
    print_models(args.rank)


if __name__ == "__main__":
    main()
