//! Compiles the proto with protox, so that no system protoc is needed.

use std::{env, error::Error, fs, path::PathBuf};

const PROTO: &str = "groupstate/v1/group_state.proto";

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=proto/{PROTO}");
    let descriptors = protox::Compiler::new(["proto"])?
        .include_source_info(true)
        .include_imports(true)
        .open_file(PROTO)?
        .file_descriptor_set();
    tonic_prost_build::configure()
        // Sorted maps: a document and a reply look the same every time.
        .btree_map(".")
        // The proto's comments are Markdown for people, with indented tables
        // that rustdoc would take for code.
        .disable_comments(["."])
        .compile_fds(descriptors)?;

    // Reflection needs the descriptors at run time, without the comments.
    let reflected = protox::Compiler::new(["proto"])?
        .include_source_info(false)
        .include_imports(true)
        .open_file(PROTO)?
        .encode_file_descriptor_set();
    fs::write(
        PathBuf::from(env::var("OUT_DIR")?).join("descriptors.binpb"),
        reflected,
    )?;
    Ok(())
}
