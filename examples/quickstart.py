"""Thirty lines: a memory that is read and written while it streams, and the CMS layer in a model of your own."""

import torch

from hope_kernels import CMS, CMSLevel, MemorySpec, memory_scan

torch.manual_seed(0)
B, T, N, D, H = 2, 100, 4, 32, 128  # sequences, tokens, heads, features, hidden features

# A memory is a small network; its weights change as it reads. Here an MLP, written every 16 tokens.
spec = MemorySpec(form="mlp", objective="l2", rule="gd")
weights = tuple(torch.randn(N, *shape) / shape[0] ** 0.5 for shape in spec.weight_shapes(D, H))
weights = tuple(weight.requires_grad_() for weight in weights)
q, k = (torch.nn.functional.normalize(torch.randn(B, T, N, D), dim=-1) for _ in range(2))
v, lr = torch.randn(B, T, N, D), 0.1 * torch.rand(B, T, N)

whole = memory_scan(q, k, v, lr, weights, spec=spec, chunk_size=16)
whole.output.square().mean().backward()  # gradients of q, k, v, lr and of the initial weights
print("output", tuple(whole.output.shape), "gradient of W_in", tuple(weights[0].grad.shape))

# The same tokens in calls of any length: the state carries what was written and what is still pending.
state, parts = weights, []
for tokens in torch.arange(T).split([1, 30, 69]):
    output, state = memory_scan(*(x[:, tokens] for x in (q, k, v, lr)), state, spec=spec, chunk_size=16)
    parts.append(output)
print("largest difference of the split run:", (torch.cat(parts, 1) - whole.output).abs().max().item())

# A layer of such memories at several frequencies, in the place of an MLP.
cms = CMS(dim=128, levels=[CMSLevel(chunk_size=16), CMSLevel(chunk_size=64), CMSLevel(chunk_size=None)], heads=N)
x = torch.randn(B, T, 128)
y = cms(x)
buffer = cms.make_buffer(B)  # serving: one token per sequence, updated in place
z = torch.stack([cms.step(x[:, t], buffer) for t in range(T)], 1)
print("CMS", tuple(y.shape), "largest difference token by token:", (z - y).abs().max().item())
