"""Plant neurons in a ViT that write high norms into some patches, and make the attention of a block go there."""

import torch

from visionattn.maps import find_artefacts


def inputs_of(module, model, images):
    """Return the input of a module's call."""
    found = []
    handle = module.register_forward_pre_hook(lambda module, args: found.append(args[0].detach()))
    with torch.no_grad():
        model(images)
    handle.remove()
    return found[0]


def plant(model, images, neurons, *, block=1, length=20.0, fraction=0.03):
    """Make neurons of a block of timm's ViT fire at a fraction of the patches, and write a long vector there."""
    mlp, first = model.blocks[block].mlp, model.num_prefix_tokens
    before = mlp.fc1(inputs_of(mlp.fc1, model, images)).detach()[:, first:]
    norm = inputs_of(model.blocks[block + 1], model, images)[:, first:].norm(dim=2).median()
    generator = torch.Generator().manual_seed(5)
    direction = torch.randn(model.embed_dim, generator=generator)
    with torch.no_grad():
        for neuron in neurons:
            values = before[:, :, neuron].flatten()
            scale = 2 / values.std()
            mlp.fc1.bias[neuron] = (mlp.fc1.bias[neuron] - values.quantile(1 - fraction)) * scale
            mlp.fc1.weight[neuron] *= scale
            other = torch.randn(model.embed_dim, generator=generator)
            mlp.fc2.weight[:, neuron] = (direction + other / 2) * length * norm / model.embed_dim**0.5
    return model


def attract(model, images, *, block=-1, strength=8.0):
    """Add `strength` to the logits with which the class token attends to high-norm tokens in a block of timm's ViT."""
    attention, channels = model.blocks[block].attn, model.embed_dim
    high = find_artefacts(model, images).mask.flatten(1)
    tokens = inputs_of(attention, model, images)
    patches = tokens[:, model.num_prefix_tokens :]
    direction = patches[high].mean(0) - patches[~high].mean(0)
    with torch.no_grad():
        query = (tokens[:, 0] @ attention.qkv.weight[:channels].T + attention.qkv.bias[:channels]).mean(0)
        query = query.unflatten(0, (attention.num_heads, -1))
        key = strength * query / query.square().sum(1, keepdim=True) / attention.scale
        attention.qkv.weight[channels : 2 * channels] += key.flatten()[:, None] * direction / direction.square().sum()
    return model
