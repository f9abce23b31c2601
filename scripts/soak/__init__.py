"""Long runs against real processes."""

from perfit_shared.grpc_environment import prepare_grpc

prepare_grpc()  # here, since every module of these imports gRPC
