"""Continual fine-tuning, CoLA then MRPC: does CoLA's posterior, as the prior for MRPC, prevent forgetting?

    python -m benchmarks.continual --checkpoints CKPT --data_dir GLUE --output_dir OUT --seeds 0,1,2

``--checkpoints`` holds the folders `cola-SEED` that `python -m benchmarks.real_data finetune` made. With a
fresh head, the encoder's last two layers and its pooler train on MRPC; afterwards CoLA's old head is put back on them.
All rows share the batches, the steps, the learning rates and no dropout; they differ in what holds the weights w near
CoLA's w_A:

    plain              nothing
    l2                 |w - w_A|^2 / (2 s^2), one constant s: the median of sigma_A; no noise
    moped              KL to N(w_A, (delta w_A)^2), trained under weight noise
    posterior          KL to CoLA's posterior N(w_A, sigma_A^2), sigma_A trained by the ELBO on CoLA; weight noise
    posterior_pull     (w - w_A)^2 / (2 sigma_A^2), the same sigma_A; no noise
    curvature          KL to N(w_A, sigma_A^2) with sigma_A from the diagonal Fisher information on CoLA; weight noise

each times kl_weight / N. The first seed runs every weight, and the held-out tenths of both tasks choose: the smallest
sum of their two NLLs. The other seeds run the chosen one. CoLA's logits are divided by the temperature that its
held-out tenth fits before MRPC begins: the checkpoint is over-fitted, and losing confidence alone would lower its NLL.
Every run leaves a file in OUT; one that is there is not run again. Development rows are only reported.
"""
