"""What was generated, compiled and timed, kept on disk: found again by a key, and never run if it isn't what was put.

    v1/kernels/<name>-<hash12>/   kernel.py, spec.json, provenance.json, manifest.json
        bin/<arch>/<function>-<hash12>/   kernel.cubin (or .hsaco), kernel.json, manifest.json
    v1/tune/<hash12>/<device>.json
    v1/locks/   v1/quarantine/

`place` writes and reads files, `manifest` tells what is whole, `store` finds and publishes, `leases` says what is in
use, `inventory`, `misses`, `prune` and `bundle` are what the command line shows and does. Nothing here imports torch.
"""
