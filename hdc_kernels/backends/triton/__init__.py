from hdc_kernels.backends.triton import small
def step(problems):
    return small.contrast(problems, None, gradients=True)
