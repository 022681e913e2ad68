//! Loads the emulator the way a program does, and reaches its own exports.

#![allow(dead_code, reason = "not every test binary that shares this file uses all of it")]

use cudarc::driver::{CudaContext, CudaFunction, CudaModule, CudaStream, DriverError, result, sys};
use cudarc::nvrtc::Ptx;
use std::ffi::{CStr, CString, c_char, c_int};
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

/// The shared library beside the test's own executable, where cargo puts it.
pub fn library_path() -> PathBuf {
    let executable = std::env::current_exe().expect("the test knows its own path");
    let folder = executable.parent().expect("an executable is in a folder");
    let path = folder.join("libcuda_emu.so");
    assert!(path.exists(), "{} is not built", path.display());
    path
}

/// Opens the emulator by its absolute path, before any other call of cudarc, and asserts that cudarc then finds it.
pub fn open() {
    // SAFETY: the library's initialisers are those of the Rust runtime.
    let library = unsafe { libloading::Library::new(library_path()) }.expect("the emulator loads");
    std::mem::forget(library);
    let version = export::<extern "C" fn() -> *const c_char>("emu_version")();
    // SAFETY: the version is a constant of the library, terminated.
    let version = unsafe { CStr::from_ptr(version) };
    assert_eq!(version.to_str(), Ok(env!("CARGO_PKG_VERSION")), "the driver is the emulator");
}

/// Opens and starts the emulator, once.
///
/// `settings` are variables for the whole process; the first caller's count. Most refusals are wanted, so they are only
/// printed if CUDA_EMU_LOG asks for them.
pub fn load(settings: &[(&str, &str)]) {
    static LOADED: OnceLock<()> = OnceLock::new();
    LOADED.get_or_init(|| {
        let silent = std::env::var_os("CUDA_EMU_LOG").is_none().then_some(&("CUDA_EMU_LOG", "none"));
        for (name, value) in settings.iter().chain(silent) {
            // SAFETY: tests come here before anything else, and nothing else in this process reads or writes variables.
            unsafe { std::env::set_var(name, value) };
        }
        open();
        result::init().expect("the driver starts");
    });
}

/// A function that only the emulator exports, through the library that cudarc has loaded.
fn export<T: Copy>(name: &str) -> T {
    // SAFETY: cudarc's library is open; every caller names the type that include/cuda_emu.h declares.
    let symbol = unsafe { sys::culib().get::<T>(name.as_bytes()) };
    *symbol.unwrap_or_else(|why| panic!("the driver that cudarc loaded is not the emulator: {why}"))
}

/// Sets how launches of this thread run; see include/cuda_emu.h.
pub fn configure(name: &str, value: &str) {
    assert_eq!(try_configure(name, value), 0, "{}", last_message());
}

pub fn try_configure(name: &str, value: &str) -> c_int {
    let function: unsafe extern "C" fn(*const c_char, *const c_char) -> c_int = export("emu_configure");
    let (name, value) = (CString::new(name).unwrap(), CString::new(value).unwrap());
    // SAFETY: both are terminated strings.
    unsafe { function(name.as_ptr(), value.as_ptr()) }
}

/// Why this thread's last failing call failed.
pub fn last_message() -> String {
    let text = export::<extern "C" fn() -> *const c_char>("emu_last_message")();
    // SAFETY: the text is terminated and lives until this thread's next failure.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
}

pub fn profile() -> serde_json::Value {
    json_of("emu_profile_json")
}

pub fn last_launch() -> serde_json::Value {
    json_of("emu_last_launch_json")
}

fn json_of(name: &str) -> serde_json::Value {
    let function: unsafe extern "C" fn(*mut c_char, *mut usize) -> c_int = export(name);
    let mut length = 0;
    // SAFETY: a null text with room 0 asks for the length alone.
    assert_eq!(unsafe { function(std::ptr::null_mut(), &mut length) }, 0);
    // Other tests may launch meanwhile, so that the text grows.
    let mut text = vec![0u8; length + 65_536];
    length = text.len();
    // SAFETY: the text has `length` bytes.
    assert_eq!(unsafe { function(text.as_mut_ptr().cast(), &mut length) }, 0);
    let text = CStr::from_bytes_until_nul(&text).expect("terminated").to_str().unwrap();
    serde_json::from_str(text).unwrap_or_else(|why| panic!("{why}: {text}"))
}

/// A context of its own, so that a fault or a leak of one test is not another's, and a stream.
pub fn device(ordinal: usize) -> (Arc<CudaContext>, Arc<CudaStream>) {
    let context = CudaContext::new_non_primary(ordinal, 0).expect("a context");
    // SAFETY: each test uses one stream at a time, or orders its streams itself.
    unsafe { context.disable_event_tracking() };
    let stream = context.new_stream().expect("a stream");
    (context, stream)
}

pub fn module(context: &Arc<CudaContext>, ptx: &str) -> Arc<CudaModule> {
    context.load_module(Ptx::from_src(ptx)).unwrap_or_else(|why| panic!("{why:?}: {}", last_message()))
}

pub fn kernel(context: &Arc<CudaContext>, ptx: &str, name: &str) -> CudaFunction {
    module(context, ptx).load_function(name).unwrap_or_else(|why| panic!("{name}: {why:?}: {}", last_message()))
}

/// The code inside an error of cudarc.
pub fn code<T>(result: Result<T, DriverError>) -> sys::CUresult {
    match result {
        Ok(_) => sys::CUresult::CUDA_SUCCESS,
        Err(DriverError(code)) => code,
    }
}
