"""``artifactfs serve``: the W&B protocol in front of a native store, for the unmodified ``wandb`` client.

``server`` runs ``app`` (routes, keys, limits); GraphQL documents are executed by ``schema`` over the nodes of ``nodes``
(reading) and ``mutations`` (writing). ``saving`` makes an upload a version, ``contents`` and ``manifests`` send what versions
hold, ``checksums`` knows the MD5 of contents that were stored without. ``state`` is the server's own disk, ``keys`` and
``signing`` say who may do what. ``docs/serve.md`` is for those who run it.
"""
