import os

# JAX's GPU interpreter runs each warpgroup of a cluster as a blocking computation of its own: with as few CPU threads
# as a small machine has cores they wait for each other forever. Read when JAX's CPU client starts.
os.environ.setdefault("PJRT_NPROC", "16")
