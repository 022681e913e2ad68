//! Gives the shared library the name under which programs look for NCCL.
//!
//! With the SONAME `libnccl.so.2`, once the library has been opened by its path, `dlopen("libnccl.so.2")` finds it
//! before any other file of that name. `nodelete` keeps its threads and statics valid after `dlclose`. Both are ELF
//! features: elsewhere the library is built without a name of its own.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    if std::env::var("CARGO_CFG_TARGET_OS").is_ok_and(|os| os == "linux") {
        println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libnccl.so.2");
        println!("cargo:rustc-cdylib-link-arg=-Wl,-z,nodelete");
    }
}
