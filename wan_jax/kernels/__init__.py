"""Kernels: each a public function, a reference, and one file a backend."""
