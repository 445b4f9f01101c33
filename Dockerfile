# See README.md for how to build it.

FROM rust:1.95-slim-bookworm AS build
WORKDIR /src
# The symbols that a stack trace would name are a quarter of the binary; panics are
# logged with file and line without them.
ENV CARGO_PROFILE_RELEASE_STRIP=symbols

# The dependencies in a layer of their own, which only these two files outdate:
# compiled for a crate with nothing in it. The manifest loses what it says about
# tests, examples and benches, whose files are not here.
COPY Cargo.toml Cargo.lock ./
RUN sed -i '/^\[\[\(test\|example\|bench\)\]\]/,/^$/d' Cargo.toml \
    && mkdir src \
    && touch src/lib.rs \
    && echo 'fn main() {}' >src/main.rs \
    && cp src/main.rs build.rs \
    && cargo build --release --locked

COPY build.rs ./
COPY proto proto
COPY src src
# cargo goes by file times; copied files may be older than what was compiled.
RUN touch build.rs src/lib.rs src/main.rs \
    && cargo build --release --locked

# glibc, libgcc and CA certificates; no shell, no package manager.
FROM gcr.io/distroless/cc-debian12:nonroot
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="groupstate" \
      org.opencontainers.image.description="Alert-group state over gRPC for the replicas of an alert-history service, kept in Redis or in memory" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
COPY --from=build /src/target/release/groupstate /usr/local/bin/groupstate
# The user `nonroot` by number, so that Kubernetes can tell that it is not root.
USER 65532:65532
EXPOSE 50051 9090
ENTRYPOINT ["/usr/local/bin/groupstate"]
