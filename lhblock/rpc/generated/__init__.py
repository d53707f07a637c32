"""Generated from lhblock/rpc/protos by lhblock.rpc.generate. Do not edit."""
