"""Diffusion: from a text embedding to an image embedding (the prior), and from there to a picture (the decoder).

Reading order: schedule, denoiser, singlestep, multistep, samplers, guidance (the mathematics, a screen each); layers,
prior, decoder (the two networks); train, generate, evaluate (what one does with them).

Glossary, used by every file here:

    x0          a clean sample: pixels in [-1, 1], or an embedding times sqrt(D) so that a coordinate has std about 1
    noise       unit Gaussian of the same shape
    sigma       std of the added noise, in units of x0; "variance exploding": the signal is never scaled down
    x           the noisy sample, x0 + sigma * noise
    network     what has the weights; sees x scaled to unit size, c_noise = log(sigma) / 4, and cond
    raw         what the network puts out; its kind (x0, eps, v, edm, flow) says what that means
    denoiser    network + preconditioning: (x, sigma, cond) -> denoised
    denoised    its guess of x0: the mean of all x0 that could have become this x
    denoise     a denoiser with cond and guidance closed in: (x, sigma) -> denoised; all that a sampler knows
    cond        a dict of tensors, first axis the batch;  null_cond: the same with the conditions taken away
    guidance    1 = follow cond as trained, 0 = ignore it, > 1 = overshoot
    sigmas      sampling grid: 1-D, falling, ends in 0
    step        from one sigma of the grid to the next;  order: steps doubled, a sampler's error falls 2^order times
    eta         share of fresh noise a random sampler puts in: 0 none, 1 as much as DDPM

A variance-preserving diffusion (DDPM, DDIM) is the same process seen through x_vp = x / sqrt(1 + sigma^2), with
alpha_bar = 1 / (1 + sigma^2), and a rectified flow the same through x_flow = x / (1 + sigma), with time =
sigma / (1 + sigma) (0 is clean); Karras et al. 2022 (arXiv 2206.00364) show it, and the samplers here use it. SNR, the
signal-to-noise ratio, is 1 / sigma^2 in all of them, for data of unit size.
"""
