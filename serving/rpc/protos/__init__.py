"""The messages of the gRPC interfaces, and the definitions they are made from.

    python -m jaxserve.serving.rpc.protos   # after a change of a .proto file

Nothing here imports the rest of jaxserve, so that clients may use it alone.
"""
