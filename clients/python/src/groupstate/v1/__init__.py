"""The messages and stubs of the API, made from the proto when the package is built."""
