# SPDX-License-Identifier: Apache-2.0
"""A Ray cluster of this machine for many drivers. It ends when its stdin is closed."""

import sys

import ray

from jobs._cli import start_ray

if __name__ == "__main__":
    # Each driver starts as many workers as there are CPUs: few, so that a run is short.
    start_ray(num_cpus=3)
    print(ray.get_runtime_context().gcs_address, flush=True)
    sys.stdin.read()
    ray.shutdown()
