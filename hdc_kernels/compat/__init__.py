"""The losses under their peers' own names, signatures and defaults: change the import, keep the call.

One module for each peer, named as the peer is imported; none needs the peer to be installed. Where a peer has
a bug, the adapter is right, and its docstring says how to get the peer's behaviour. A `temperature`, `scale` or
`logit_scale` may always be a tensor, and gets its gradient.
"""


def refuse_distributed(**given: tuple[object, object]) -> None:
    """Each argument as (what was given, its default in a single process); raises ValueError if they differ."""
    for name, (value, default) in given.items():
        if value != default:
            raise ValueError(
                f"{name} is {value!r}; several processes are not supported yet, it must be {default!r}"
            )
