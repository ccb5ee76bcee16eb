"""The laboratory: each claim about contrastive learning and diffusion as a picture and a number with a verdict.

Everything is made with the code that trains and draws the real thing: schedule, denoiser, fit, samplers, guidance. An
experiment is a function that writes its figures into a folder and returns findings; `lab/commands.py` runs it.

    commands.py    the command lines; parts.py: paths and options -> an experiment that is ready to run
    experiment.py  Finding (a number, the band it should lie in, what it says), Experiment (figures + findings)
    style.py       palette, axes, figure -> PNG: the same colour for the same thing everywhere
    run.py         a person's trained folders, found by their manifests
    story.py       `lab all`: all experiments in order; page.py: as one page
    spiral.py      a Swiss roll as pictures of two pixels, its parts as classes, its exact denoiser
    plane.py       a network on the plane, trained by fit; scores of drawn points; plane_figures.py
    walks.py       a sampler's way down on the plane, every position kept
    field.py       `lab spiral`: what is trained and why, against the exact score; field_figures.py
    sampling.py    `lab sampling`: what ddpm's noise is for, what few steps cost; sampling_figures.py
    steering.py    `lab guidance`: three classes, guidance from 0 to 10, what is not wanted; steering_figures.py
    noising.py     the way to static as a random walk and as one jump; cube.py: pixels in the RGB cube
    forward.py     `lab forward`: one picture under every schedule; forward_figures.py
    belief.py      real pictures, what a decoder believes of them, a walk written down; how much detail there is
    denoise.py     `lab denoise`: one step against the walk, with noise and without; denoise_figures.py
    mosaic.py      pictures in rows and columns with words, as a figure
    space.py       `lab space`: the experiment on a CLIP's space; bench.py: what its parts share
    pairs.py       captioned pictures through a CLIP; similarity.py, gap.py, neighbours.py, choice.py: what is measured
    analogies.py   sums found in the shards' own names; sums.py, analogy_figures.py: their scores and charts
    unclip.py      `lab unclip`: what the prior is for, what an embedding holds; unclip_figures.py
    chance.py      permutation bands: what chance alone reaches
"""
