"""The laboratory: each claim about contrastive learning and diffusion as a picture and a number with a verdict.

Everything is made with the code that trains and draws the real thing: schedule, denoiser, fit, samplers, guidance. An
experiment is a function that writes its figures into a folder and returns findings; `lab/commands.py` runs it.

    experiment.py   Finding (a number, the band it should lie in, what it says), Experiment (figures + findings)
    style.py        palette, axes, figure -> PNG: the same colour for the same thing everywhere
    spiral.py       a Swiss roll as pictures of two pixels, its parts as classes, its exact denoiser
    plane.py        a network on the plane, trained by fit; scores of drawn points
"""
