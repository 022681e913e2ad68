//! The CUDA driver of this process: the functions of the library that the program has loaded already, under the name
//! that the emulator has or under that of NVIDIA's. Nothing is loaded here.
//!
//! Handles are numbers here, so that they may pass between threads, as the driver allows.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::sync::OnceLock;

use crate::codes::{Answer, Code, refuse};

type Raw = *mut c_void;
/// A host function of a stream, or the destructor of a user object.
pub type HostFunction = unsafe extern "C" fn(*mut c_void);

macro_rules! functions {
    ($($name:ident: $symbol:literal ( $($ty:ty),* );)*) => {
        struct Table {
            $($name: unsafe extern "C" fn($($ty),*) -> c_int,)*
        }

        impl Table {
            /// # Safety
            /// `library` is an open CUDA driver.
            unsafe fn load(library: Raw) -> Answer<Table> {
                Ok(Table {
                    // SAFETY: the caller's library; the driver API declares a function of this name with this type.
                    $($name: unsafe {
                        std::mem::transmute::<Raw, unsafe extern "C" fn($($ty),*) -> c_int>(symbol(library, $symbol)?)
                    },)*
                })
            }
        }
    };
}

functions! {
    init: c"cuInit" (c_uint);
    error_name: c"cuGetErrorName" (c_int, *mut *const c_char);
    device_get: c"cuDeviceGet" (*mut c_int, c_int);
    device_uuid: c"cuDeviceGetUuid" (*mut [u8; 16], c_int);
    primary_retain: c"cuDevicePrimaryCtxRetain" (*mut Raw, c_int);
    context_get: c"cuCtxGetCurrent" (*mut Raw);
    context_set: c"cuCtxSetCurrent" (Raw);
    context_device: c"cuCtxGetDevice" (*mut c_int);
    stream_context: c"cuStreamGetCtx" (Raw, *mut Raw);
    stream_capturing: c"cuStreamIsCapturing" (Raw, *mut c_int);
    stream_capture: c"cuStreamGetCaptureInfo_v2"
        (Raw, *mut c_int, *mut u64, *mut Raw, *mut *const Raw, *mut usize);
    thread_mode: c"cuThreadExchangeStreamCaptureMode" (*mut c_int);
    pointer_attribute: c"cuPointerGetAttribute" (Raw, c_int, u64);
    host_alloc: c"cuMemHostAlloc" (*mut Raw, usize, c_uint);
    host_free: c"cuMemFreeHost" (Raw);
    to_host: c"cuMemcpyDtoHAsync_v2" (Raw, u64, usize, Raw);
    to_device: c"cuMemcpyHtoDAsync_v2" (u64, *const c_void, usize, Raw);
    fill: c"cuMemsetD8Async" (u64, u8, usize, Raw);
    host_function: c"cuLaunchHostFunc" (Raw, HostFunction, Raw);
    object_create: c"cuUserObjectCreate" (*mut Raw, Raw, HostFunction, c_uint, c_uint);
    object_release: c"cuUserObjectRelease" (Raw, c_uint);
    graph_retain: c"cuGraphRetainUserObject" (Raw, Raw, c_uint, c_uint);
}

/// The address of a function.
///
/// # Safety
/// `library` is open.
unsafe fn symbol(library: Raw, name: &CStr) -> Answer<Raw> {
    // SAFETY: the library is open, and the name ends with a zero.
    let address = unsafe { libc::dlsym(library, name.as_ptr()) };
    if address.is_null() {
        return refuse(Code::CUDA, format!("the CUDA driver has no {}: it is too old", name.to_string_lossy()));
    }
    Ok(address)
}

fn table() -> Answer<&'static Table> {
    static TABLE: OnceLock<Table> = OnceLock::new();
    if let Some(table) = TABLE.get() {
        return Ok(table);
    }
    for name in [c"libcuda.so", c"libcuda.so.1"] {
        // SAFETY: opens a library that is open already, or nothing; none is loaded, so that no initialiser runs.
        let library = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_NOLOAD) };
        if !library.is_null() {
            // SAFETY: the handle that dlopen has just returned, of a library with the name of a CUDA driver. It is
            // never closed.
            let loaded = unsafe { Table::load(library) }?;
            return Ok(TABLE.get_or_init(|| loaded));
        }
    }
    refuse(Code::CUDA, "no CUDA driver is loaded in this process (libcuda.so or libcuda.so.1)")
}

fn check(table: &Table, what: &str, code: c_int) -> Answer {
    if code == 0 {
        return Ok(());
    }
    let mut name = std::ptr::null();
    // SAFETY: writes one pointer to a constant text, or null.
    let known = unsafe { (table.error_name)(code, &mut name) } == 0 && !name.is_null();
    // SAFETY: the driver's constant, which ends with a zero.
    let name = if known { unsafe { CStr::from_ptr(name) }.to_string_lossy() } else { "an unknown error".into() };
    refuse(Code::CUDA, format!("{what} failed with {name} ({code})"))
}

/// The calling thread's current context.
pub fn current_context() -> Answer<usize> {
    let table = table()?;
    let mut context = std::ptr::null_mut();
    // SAFETY: writes one handle.
    check(table, "cuCtxGetCurrent", unsafe { (table.context_get)(&mut context) })?;
    if context.is_null() {
        return refuse(Code::USAGE, "this thread has no current CUDA context, whose device a rank would use");
    }
    Ok(context.addr())
}

/// Makes a context current on the calling thread.
pub fn make_current(context: usize) -> Answer {
    let table = table()?;
    // SAFETY: the driver refuses a handle that is no context.
    check(table, "cuCtxSetCurrent", unsafe { (table.context_set)(context as Raw) })
}

/// Does `work` with a context current, and then has the former one again.
pub fn within<T>(context: usize, work: impl FnOnce() -> Answer<T>) -> Answer<T> {
    let table = table()?;
    let mut former = std::ptr::null_mut();
    // SAFETY: writes one handle.
    check(table, "cuCtxGetCurrent", unsafe { (table.context_get)(&mut former) })?;
    make_current(context)?;
    let done = work();
    make_current(former.addr())?;
    done
}

/// The number of the current context's device, and what tells it from others.
pub fn current_device() -> Answer<(c_int, [u8; 16])> {
    let table = table()?;
    let (mut device, mut uuid) = (0, [0; 16]);
    // SAFETY: writes one number.
    check(table, "cuCtxGetDevice", unsafe { (table.context_device)(&mut device) })?;
    // SAFETY: writes sixteen bytes.
    check(table, "cuDeviceGetUuid", unsafe { (table.device_uuid)(&mut uuid, device) })?;
    Ok((device, uuid))
}

/// The primary context of a device, which stays for the life of the process.
pub fn primary_context(ordinal: c_int) -> Answer<usize> {
    let table = table()?;
    let (mut device, mut context) = (0, std::ptr::null_mut());
    // SAFETY: starts the driver, or does nothing.
    check(table, "cuInit", unsafe { (table.init)(0) })?;
    // SAFETY: writes one number.
    check(table, "cuDeviceGet", unsafe { (table.device_get)(&mut device, ordinal) })?;
    // SAFETY: writes one handle.
    check(table, "cuDevicePrimaryCtxRetain", unsafe { (table.primary_retain)(&mut context, device) })?;
    Ok(context.addr())
}

/// The context of a stream.
pub fn context_of(stream: usize) -> Answer<usize> {
    let table = table()?;
    let mut context = std::ptr::null_mut();
    // SAFETY: writes one handle; the driver refuses what is no stream, as far as it can tell.
    check(table, "cuStreamGetCtx", unsafe { (table.stream_context)(stream as Raw, &mut context) })?;
    Ok(context.addr())
}

/// True if what a stream is given becomes a graph.
pub fn is_capturing(stream: usize) -> Answer<bool> {
    const INVALIDATED: c_int = 2;
    let table = table()?;
    let mut status = 0;
    // SAFETY: writes one number.
    check(table, "cuStreamIsCapturing", unsafe { (table.stream_capturing)(stream as Raw, &mut status) })?;
    if status == INVALIDATED {
        return refuse(Code::USAGE, "the capture of the stream has been invalidated by an earlier call");
    }
    Ok(status != 0)
}

/// Lets the graph that a capturing stream becomes own `data`: `destroy` gets it when the last graph is gone, or now if
/// that cannot be arranged.
///
/// # Safety
/// `destroy` may be called once with `data`, from any thread, now or at any later time.
pub unsafe fn tie_to_capture(stream: usize, data: *mut c_void, destroy: HostFunction) -> Answer {
    const NO_DESTRUCTOR_SYNC: c_uint = 1;
    const MOVE: c_uint = 1;
    let mut object = std::ptr::null_mut();
    let created = table().and_then(|table| {
        // SAFETY: what the caller promises of `destroy` and `data`.
        let created = unsafe { (table.object_create)(&mut object, data, destroy, 1, NO_DESTRUCTOR_SYNC) };
        check(table, "cuUserObjectCreate", created).map(|()| table)
    });
    let table = created.inspect_err(|_| {
        // SAFETY: the one call that the caller allows; there is no object that would make another.
        unsafe { destroy(data) };
    })?;
    let (mut status, mut sequence, mut graph) = (0, 0, std::ptr::null_mut());
    let (mut dependencies, mut count) = (std::ptr::null(), 0);
    // SAFETY: writes what is asked for, one value each.
    let asked = unsafe {
        let to = (&mut status, &mut sequence, &mut graph, &mut dependencies, &mut count);
        (table.stream_capture)(stream as Raw, to.0, to.1, to.2, to.3, to.4)
    };
    let tied = check(table, "cuStreamGetCaptureInfo", asked).and_then(|()| {
        // SAFETY: the graph and the object of just now; the graph takes over the object's only reference.
        check(table, "cuGraphRetainUserObject", unsafe { (table.graph_retain)(graph, object, 1, MOVE) })
    });
    tied.inspect_err(|_| {
        // SAFETY: the object's only reference, which no graph has taken over. It calls `destroy`.
        let _ = unsafe { (table.object_release)(object, 1) };
    })
}

/// An allocation: its first byte, its size, its device, and whether it is device memory.
#[derive(Clone, Copy, Debug)]
pub struct Allocation {
    pub start: u64,
    pub bytes: u64,
    pub device: c_int,
    pub on_device: bool,
}

/// The allocation that holds an address; `None` if there is none.
pub fn allocation(address: u64) -> Answer<Option<Allocation>> {
    const MEMORY_TYPE: c_int = 2;
    const DEVICE_ORDINAL: c_int = 9;
    const RANGE_START: c_int = 11;
    const RANGE_SIZE: c_int = 12;
    const ON_DEVICE: c_uint = 2;
    let table = table()?;
    let (mut kind, mut device, mut start, mut bytes) = (0 as c_uint, 0 as c_int, 0u64, 0usize);
    let places: [(c_int, Raw); 4] = [
        (MEMORY_TYPE, (&raw mut kind).cast()),
        (DEVICE_ORDINAL, (&raw mut device).cast()),
        (RANGE_START, (&raw mut start).cast()),
        (RANGE_SIZE, (&raw mut bytes).cast()),
    ];
    for (attribute, place) in places {
        // SAFETY: each place has the type that the manual gives its attribute.
        if unsafe { (table.pointer_attribute)(place, attribute, address) } != 0 {
            return Ok(None);
        }
    }
    Ok(Some(Allocation { start, bytes: bytes as u64, device, on_device: kind == ON_DEVICE }))
}

/// Page-locked memory of the current context, though a capture may be under way.
pub fn alloc_host(bytes: usize) -> Answer<*mut u8> {
    const RELAXED: c_int = 2;
    const PORTABLE: c_uint = 1;
    let table = table()?;
    let mut mode = RELAXED;
    // SAFETY: exchanges one number.
    check(table, "cuThreadExchangeStreamCaptureMode", unsafe { (table.thread_mode)(&mut mode) })?;
    let mut memory = std::ptr::null_mut();
    // SAFETY: writes one address.
    let answer = unsafe { (table.host_alloc)(&mut memory, bytes, PORTABLE) };
    // SAFETY: puts the former number back.
    let back = unsafe { (table.thread_mode)(&mut mode) };
    check(table, &format!("cuMemHostAlloc of {bytes} bytes"), answer)?;
    check(table, "cuThreadExchangeStreamCaptureMode", back)?;
    Ok(memory.cast())
}

/// Gives page-locked memory back.
///
/// # Safety
/// From [`alloc_host`], and nothing uses it any more.
pub unsafe fn free_host(memory: *mut u8) -> Answer {
    let table = table()?;
    // SAFETY: guaranteed by the caller.
    check(table, "cuMemFreeHost", unsafe { (table.host_free)(memory.cast()) })
}

/// Copies from the device, in stream order.
///
/// # Safety
/// Both ranges have so many bytes until the stream has passed the copy, or for the life of the graph that it captures.
pub unsafe fn copy_to_host(to: *mut u8, from: u64, bytes: usize, stream: usize) -> Answer {
    let table = table()?;
    // SAFETY: guaranteed by the caller.
    check(table, "cuMemcpyDtoHAsync", unsafe { (table.to_host)(to.cast(), from, bytes, stream as Raw) })
}

/// Copies to the device, in stream order.
///
/// # Safety
/// As [`copy_to_host`].
pub unsafe fn copy_to_device(to: u64, from: *const u8, bytes: usize, stream: usize) -> Answer {
    let table = table()?;
    // SAFETY: guaranteed by the caller.
    check(table, "cuMemcpyHtoDAsync", unsafe { (table.to_device)(to, from.cast(), bytes, stream as Raw) })
}

/// Sets device memory to NaN, of any type of floats, in stream order.
///
/// # Safety
/// As [`copy_to_host`].
pub unsafe fn poison(to: u64, bytes: usize, stream: usize) -> Answer {
    let table = table()?;
    // SAFETY: guaranteed by the caller.
    check(table, "cuMemsetD8Async", unsafe { (table.fill)(to, u8::MAX, bytes, stream as Raw) })
}

/// Calls `function` with `data`, in stream order.
///
/// # Safety
/// It may be called so once, or each time that the graph is launched which captures it.
pub unsafe fn call_on_host(stream: usize, function: HostFunction, data: *mut c_void) -> Answer {
    let table = table()?;
    // SAFETY: guaranteed by the caller.
    check(table, "cuLaunchHostFunc", unsafe { (table.host_function)(stream as Raw, function, data) })
}
