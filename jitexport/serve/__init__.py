"""Prebuilt bundles behind the images API that clients already speak.

- `app`: routes, `reading` and `streaming`: bodies in, events out
- `schema`: what a request may say; `errors`: answers to what it may not
- `catalog`: what is served, from manifests alone; `store`: what is loaded, within a memory budget
- `jobs`: one image to make, and what is told of it
- `engine`: the bounded queue, batches and the one thread that computes; `batch`: one batch
- `protocol`, `server`: uvicorn, time limits, signals
- `ray_app`: the same application on a Ray cluster
"""
