"""The routed step in Triton: a few launches for the whole model, no word to the host.

Letters: L routed layers, R LoRA experts a layer, E = R + 1 experts, S tensors (slots), N blocks of work.

1. ``products``: the gradients of all LoRA pairs from the dense gradients.
2. ``moments``: all experts' moments, and the sums that scores are made of, added up in a fixed order. Of moments in 8 bits
   only the sums (``packed``).
3. ``winners``: the AdamW step of the experts that won; what lost returns at once and is not read.
4. ``fold``: the winners' changes into the effective weights.
5. ``settle``: moments in 8 bits moved and written back, and the step of winners that have such.

Of sharded weights (FSDP2) every rank works on its rows. Between 1 and 2 one all-reduce sums the gradients of A and gathers the
norms, between 2 and 3 another one sums the scores, and the first rank's decision is sent to all.

Whether they may take a run's steps unasked, a ``trial`` on the device says, one for each of the ``kinds`` of steps.

Nothing here but ``checks`` and ``kinds`` is imported unless a fused step is asked for or tried. With ``TRITON_INTERPRET=1``
everything runs on a CPU, slowly.
"""
