//! The exported functions. Names, arguments and results are those of `nccl.h`.
//!
//! Invariant: no panic leaves an exported function. A panic inside is a fault of this library; the caller sees
//! ncclInternalError and the panic's text.
#![allow(non_snake_case, reason = "the exported functions have the names of NCCL's")]

use std::cell::RefCell;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::mem::ManuallyDrop;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;

use crate::batch::{Arguments, Asked};
use crate::call::Kind;
use crate::codes::{Answer, Code, Refusal, refuse};
use crate::comm::{self, Comm, lock};
use crate::settings::{Log, log, settings};
use crate::wire::{ID_BYTES, Meeting};
use crate::{driver, group, hub};

/// An `ncclUniqueId`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct UniqueId {
    internal: [u8; ID_BYTES],
}

/// The part of an `ncclConfig_t` that every version of NCCL from 2.14 on has.
#[repr(C)]
pub struct Config {
    size: usize,
    magic: u32,
    version: u32,
    blocking: c_int,
}

type Handle = *mut c_void;

thread_local! {
    /// The sentence of this thread's last failed call. Without a destructor: programs may call from their own.
    static LAST_MESSAGE: RefCell<ManuallyDrop<String>> = const { RefCell::new(ManuallyDrop::new(String::new())) };
}

/// Runs the body of the exported function `name` and converts its result into a code.
fn guard(name: &str, body: impl FnOnce() -> Answer<Code>) -> Code {
    if log() == Log::Calls {
        eprintln!("nccl_emu: {name}");
    }
    let done = catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|payload| {
        let text = payload.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| payload.downcast_ref::<&str>().copied()).unwrap_or("no message");
        refuse(Code::INTERNAL, format!("nccl_emu itself failed, please report it: {text}"))
    });
    done.unwrap_or_else(|Refusal { code, message }| {
        if log() != Log::None {
            eprintln!("nccl_emu: {name} returns {}: {message}", code.0);
        }
        LAST_MESSAGE.with_borrow_mut(|last| **last = message);
        code
    })
}

/// A text that stays for the life of the process, as the caller of `ncclGetLastError` may expect.
fn keep(text: String) -> *const c_char {
    static KEPT: Mutex<Vec<&'static CStr>> = Mutex::new(Vec::new());
    let text = CString::new(text.replace('\0', " ")).unwrap_or_default();
    let mut kept = lock(&KEPT);
    if let Some(same) = kept.iter().find(|kept| ***kept == *text) {
        return same.as_ptr();
    }
    let text: &'static CStr = Box::leak(text.into_boxed_c_str());
    kept.push(text);
    text.as_ptr()
}

/// Writes a result to the caller's pointer; null is refused.
///
/// # Safety
/// `place` is null or valid for a write.
unsafe fn give<T>(place: *mut T, value: T, what: &str) -> Answer<Code> {
    if place.is_null() {
        return refuse(Code::ARGUMENT, format!("the pointer for {what} is null"));
    }
    // SAFETY: not null, so valid as the caller guarantees.
    unsafe { place.write_unaligned(value) };
    Ok(Code::SUCCESS)
}

/// Whether a communicator of this configuration blocks.
///
/// # Safety
/// `config` is null or begins with its own size.
unsafe fn blocking(config: *const Config) -> Answer<bool> {
    const MAGIC: u32 = 0xcafe_beef;
    const LEAST: usize = std::mem::offset_of!(Config, blocking) + size_of::<c_int>();
    if config.is_null() {
        return Ok(true);
    }
    // SAFETY: guaranteed by the caller.
    let size = unsafe { (&raw const (*config).size).read_unaligned() };
    if size < LEAST {
        return refuse(
            Code::ARGUMENT,
            format!("the configuration says that it has {size} bytes: it has {LEAST} at least"),
        );
    }
    // SAFETY: all of these lie in the bytes that it says it has.
    let (magic, version, blocking) = unsafe {
        let magic = (&raw const (*config).magic).read_unaligned();
        let version = (&raw const (*config).version).read_unaligned();
        (magic, version, (&raw const (*config).blocking).read_unaligned())
    };
    if magic != MAGIC {
        let what = format!("the configuration begins with {magic:#x}: it was not made by NCCL_CONFIG_INITIALIZER");
        return refuse(Code::ARGUMENT, what);
    }
    match blocking {
        _ if version < 21400 => Ok(true),
        c_int::MIN | 1 => Ok(true),
        0 => Ok(false),
        _ => refuse(Code::ARGUMENT, format!("the configuration's `blocking` is {blocking}: it must be 0 or 1")),
    }
}

/// Makes a communicator and connects it, or lets the open group connect it.
///
/// # Safety
/// `place` is null or valid for a write.
unsafe fn init(place: *mut Handle, size: c_int, id: UniqueId, rank: c_int, blocking: bool) -> Answer<Code> {
    // SAFETY: guaranteed by the caller, here and below.
    unsafe { give(place, std::ptr::null_mut(), "the communicator") }?;
    let Some(meeting) = Meeting::from_id(&id.internal) else {
        return refuse(Code::ARGUMENT, "the id was not made by this library's ncclGetUniqueId, or was changed since");
    };
    let comm = Comm::new(rank, size, blocking)?;
    // SAFETY: as above.
    unsafe { give(place, comm.handle as Handle, "the communicator") }?;
    group::init(vec![(comm.clone(), meeting)]).inspect_err(|_| {
        comm.forget();
        // SAFETY: as above.
        let _ = unsafe { give(place, std::ptr::null_mut(), "the communicator") };
    })
}

/// `ncclCommInitAll`: one thread has all ranks.
///
/// # Safety
/// `places` is null or has room for `count` handles, `devices` is null or has as many numbers.
unsafe fn init_all(places: *mut Handle, count: c_int, devices: *const c_int) -> Answer<Code> {
    if places.is_null() || count < 1 {
        return refuse(Code::ARGUMENT, format!("{count} communicators at {places:p}"));
    }
    let meeting = hub::start()?;
    let mut comms = Vec::new();
    for rank in 0..count {
        // SAFETY: guaranteed by the caller.
        let device = if devices.is_null() { rank } else { unsafe { devices.add(rank as usize).read_unaligned() } };
        let context = driver::primary_context(device)?;
        comms.push((driver::within(context, || Comm::new(rank, count, true))?, meeting));
    }
    for (at, (comm, _)) in comms.iter().enumerate() {
        // SAFETY: guaranteed by the caller.
        unsafe { give(places.add(at), comm.handle as Handle, "a communicator") }?;
    }
    group::init(comms)
}

/// A call that moves or joins elements.
fn ask(comm: Handle, arguments: Arguments) -> Answer<Code> {
    let run = || {
        let comm = comm::find(comm)?;
        let _inside = comm.enter(arguments.function)?;
        comm.ready(arguments.function)?;
        let asked = Asked::new(&comm, &arguments)?;
        group::call(&comm, asked)
    };
    run().inspect_err(group::spoil)
}

/// Arguments of a call without root, peer and operator.
fn plain(function: &'static str, kind: Kind, from: *const c_void, to: Handle, count: usize, dtype: c_int) -> Arguments {
    Arguments { function, kind, from, to, count, dtype, op: 0, other: 0, stream: std::ptr::null_mut() }
}

/// Declares exported functions: `exports! { fn ncclName(arg: Type) { body -> Answer<Code> } ... }`.
macro_rules! exports {
    ($(fn $name:ident ( $($arg:ident : $ty:ty),* $(,)? ) $body:block)*) => {$(
        #[unsafe(no_mangle)]
        #[allow(unused_unsafe, reason = "some bodies touch none of the caller's pointers")]
        #[allow(clippy::too_many_arguments, reason = "NCCL decides the arguments")]
        pub unsafe extern "C" fn $name($($arg: $ty),*) -> Code {
            guard(stringify!($name), || {
                // SAFETY: the caller guarantees the pointers that it passes, as NCCL's manual demands; the bodies check
                // for null wherever a program could pass it by mistake.
                unsafe { $body }
            })
        }
    )*};
}

/// The version of this library as text. A program that finds this symbol knows that its NCCL is the stand-in.
#[unsafe(no_mangle)]
pub extern "C" fn nccl_emu_version() -> *const c_char {
    const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), "\0");
    VERSION.as_ptr().cast()
}

#[unsafe(no_mangle)]
pub extern "C" fn ncclGetErrorString(code: Code) -> *const c_char {
    code.text().as_ptr()
}

/// Why the communicator has failed, or else why the calling thread's last failed call did.
#[unsafe(no_mangle)]
pub extern "C" fn ncclGetLastError(comm: Handle) -> *const c_char {
    let failure = comm::find(comm).ok().and_then(|comm| comm.failure());
    keep(failure.map_or_else(|| LAST_MESSAGE.with_borrow(|last| (**last).clone()), |failure| failure.message))
}

exports! {
    fn ncclGetVersion(version: *mut c_int) {
        give(version, settings()?.version, "the version")
    }

    fn ncclGetUniqueId(id: *mut UniqueId) {
        if id.is_null() {
            return refuse(Code::ARGUMENT, "the pointer for the id is null");
        }
        give(id, UniqueId { internal: hub::start()?.to_id() }, "the id")
    }

    fn ncclCommInitRank(comm: *mut Handle, size: c_int, id: UniqueId, rank: c_int) {
        init(comm, size, id, rank, true).inspect_err(group::spoil)
    }

    fn ncclCommInitRankConfig(comm: *mut Handle, size: c_int, id: UniqueId, rank: c_int, config: *const Config) {
        blocking(config).and_then(|blocking| init(comm, size, id, rank, blocking)).inspect_err(group::spoil)
    }

    fn ncclCommInitAll(comms: *mut Handle, count: c_int, devices: *const c_int) {
        init_all(comms, count, devices).inspect_err(group::spoil)
    }

    fn ncclCommFinalize(comm: Handle) {
        let comm = comm::find(comm)?;
        let _inside = comm.enter("ncclCommFinalize")?;
        comm.may_finalise()?;
        let finalising = comm.start("ncclCommFinalize", |comm| comm.finalise())?;
        if !comm.blocking {
            return Ok(Code::IN_PROGRESS);
        }
        let done = finalising.join().unwrap_or_else(|_| refuse(Code::INTERNAL, "a thread has panicked"));
        done.map(|()| Code::SUCCESS)
    }

    fn ncclCommDestroy(comm: Handle) {
        if comm.is_null() {
            return Ok(Code::SUCCESS);
        }
        let comm = comm::find(comm)?;
        let _inside = comm.enter("ncclCommDestroy")?;
        comm.destroy().map(|()| Code::SUCCESS)
    }

    fn ncclCommAbort(comm: Handle) {
        if comm.is_null() {
            return Ok(Code::SUCCESS);
        }
        let comm = comm::find(comm)?;
        let _inside = comm.enter("ncclCommAbort")?;
        comm.abort().map(|()| Code::SUCCESS)
    }

    fn ncclCommGetAsyncError(comm: Handle, code: *mut Code) {
        give(code, comm::find(comm)?.status(), "the error")
    }

    fn ncclCommCount(comm: Handle, count: *mut c_int) {
        let comm = comm::find(comm)?;
        comm.ready("ncclCommCount")?;
        give(count, comm.size as c_int, "the count")
    }

    fn ncclCommCuDevice(comm: Handle, device: *mut c_int) {
        let comm = comm::find(comm)?;
        comm.ready("ncclCommCuDevice")?;
        give(device, comm.device, "the device")
    }

    fn ncclCommUserRank(comm: Handle, rank: *mut c_int) {
        let comm = comm::find(comm)?;
        comm.ready("ncclCommUserRank")?;
        give(rank, comm.rank as c_int, "the rank")
    }

    fn ncclGroupStart() {
        group::start();
        Ok(Code::SUCCESS)
    }

    fn ncclGroupEnd() {
        group::end()
    }

    fn ncclSend(from: *const c_void, count: usize, dtype: c_int, peer: c_int, comm: Handle, stream: Handle) {
        let arguments = plain("ncclSend", Kind::Send, from, std::ptr::null_mut(), count, dtype);
        ask(comm, Arguments { other: peer, stream, ..arguments })
    }

    fn ncclRecv(to: Handle, count: usize, dtype: c_int, peer: c_int, comm: Handle, stream: Handle) {
        let arguments = plain("ncclRecv", Kind::Recv, std::ptr::null(), to, count, dtype);
        ask(comm, Arguments { other: peer, stream, ..arguments })
    }

    fn ncclBroadcast(
        from: *const c_void, to: Handle, count: usize, dtype: c_int, root: c_int, comm: Handle, stream: Handle,
    ) {
        let arguments = plain("ncclBroadcast", Kind::Broadcast, from, to, count, dtype);
        ask(comm, Arguments { other: root, stream, ..arguments })
    }

    fn ncclAllGather(from: *const c_void, to: Handle, count: usize, dtype: c_int, comm: Handle, stream: Handle) {
        let arguments = plain("ncclAllGather", Kind::AllGather, from, to, count, dtype);
        ask(comm, Arguments { stream, ..arguments })
    }

    fn ncclAllReduce(
        from: *const c_void, to: Handle, count: usize, dtype: c_int, op: c_int, comm: Handle, stream: Handle,
    ) {
        let arguments = plain("ncclAllReduce", Kind::AllReduce, from, to, count, dtype);
        ask(comm, Arguments { op, stream, ..arguments })
    }

    fn ncclReduce(
        from: *const c_void, to: Handle, count: usize, dtype: c_int, op: c_int, root: c_int, comm: Handle,
        stream: Handle,
    ) {
        let arguments = plain("ncclReduce", Kind::Reduce, from, to, count, dtype);
        ask(comm, Arguments { op, other: root, stream, ..arguments })
    }

    fn ncclReduceScatter(
        from: *const c_void, to: Handle, count: usize, dtype: c_int, op: c_int, comm: Handle, stream: Handle,
    ) {
        let arguments = plain("ncclReduceScatter", Kind::ReduceScatter, from, to, count, dtype);
        ask(comm, Arguments { op, stream, ..arguments })
    }
}
