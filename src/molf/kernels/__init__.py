"""The routed step for the whole model, without a sync: element-wise work in Triton, products by cuBLAS.

Letters: L routed layers, R LoRA experts a layer, E = R + 1 experts, S tensors, N blocks of work.

1. ``pairs``: the gradients of all LoRA pairs from the dense gradients.
2. ``moments``: all experts' moments, and the sums that scores are made of, added in a fixed order; ``quantized`` computes the
   sums of 8-bit moments.
3. ``winners``: the AdamW step of the experts that won. Blocks of losers return at once and read nothing. ``quantized`` also
   writes 8-bit moments back.
4. ``pairs`` again: the step of the pairs that won, and what they change in the effective weights, as one product a layer.

``plan`` lists the tensors, ``launches`` makes the tables that kernels read, ``prepared`` asks at every step whether both still
hold, and ``step`` has the order. Of sharded weights (FSDP2) every rank works on its rows. An all-reduce between 1 and 2 sums the
gradients of A and gathers the norms; one between 2 and 3 sums the scores, and rank 0's decision is broadcast.

Only ``checks`` is imported unless a fused step is requested or tested. With ``TRITON_INTERPRET=1`` everything runs on a CPU,
slowly.
"""
