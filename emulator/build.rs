//! Gives the shared library the name under which programs look for a CUDA driver.
//!
//! With the SONAME `libcuda.so`, once the library has been opened by its path, `dlopen("libcuda.so")` finds it before
//! any other file of that name. `nodelete` keeps its threads and statics valid after `dlclose`. Both are ELF features:
//! elsewhere the library is built without a name of its own.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    if std::env::var("CARGO_CFG_TARGET_OS").is_ok_and(|os| os == "linux") {
        println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libcuda.so");
        println!("cargo:rustc-cdylib-link-arg=-Wl,-z,nodelete");
    }
}
