//! Devices: figures by compute capability, attributes, names; `cuInit` and versions.

use super::call::{Answer, exports, give, refuse, text};
use super::codes::Code;
use super::state::{self, Device, driver, init};
use std::ffi::{c_char, c_int, c_uint};

/// Maximum threads per block, on every device so far.
pub const MAX_THREADS: u32 = 1024;
/// Maximum shared memory of a block without opting in to more.
pub const SHARED_WITHOUT_OPT_IN: u32 = 48 << 10;
/// The newest version of the driver API that the exported functions follow.
pub const DRIVER_VERSION: c_int = 13_000;

/// The programming guide's table of compute capabilities, combined with the settings.
#[derive(Clone, Copy, Debug)]
pub struct Figures {
    pub capability: (u32, u32),
    pub multiprocessors: u32,
    pub max_grid: [u32; 3],
    pub max_block: [u32; 3],
    pub threads_per_multiprocessor: u32,
    pub blocks_per_multiprocessor: u32,
    /// 32-bit registers of a multiprocessor.
    pub registers: u32,
    pub shared_per_multiprocessor: u32,
    /// Maximum shared memory of a block that opts in.
    pub shared_per_block_opt_in: u32,
    /// Shared memory reserved by the system in each block.
    pub shared_reserved: u32,
    /// Allocation granularity of shared memory.
    pub shared_unit: u32,
    pub l2_bytes: u32,
}

pub fn figures(_device: &Device) -> Figures {
    // All devices are alike. The driver exists, since a device does.
    let (capability, multiprocessors) = match state::driver_if_any() {
        Some(driver) => (driver.settings.capability, driver.settings.multiprocessors),
        None => ((8, 0), 108),
    };
    figures_of(capability, multiprocessors)
}

fn figures_of(capability: (u32, u32), multiprocessors: u32) -> Figures {
    // (threads and blocks of a multiprocessor, KiB of shared memory of one, KiB of a block that asks, L2 in MiB)
    let (threads, blocks, shared, opt_in, l2) = match capability {
        (..=6, _) => (2048, 32, 64, 48, 4),
        (7, 5) => (1024, 16, 64, 64, 4),
        (7, _) => (2048, 32, 96, 96, 6),
        (8, 0) => (2048, 32, 164, 163, 40),
        (8, 7) => (1536, 16, 164, 163, 4),
        (8, 9) => (1536, 24, 100, 99, 72),
        (8, _) => (1536, 16, 100, 99, 6),
        (9..=11, _) => (2048, 32, 228, 227, 50),
        _ => (1536, 24, 100, 99, 64),
    };
    Figures {
        capability,
        multiprocessors,
        max_grid: [i32::MAX as u32, 65_535, 65_535],
        max_block: [1024, 1024, 64],
        threads_per_multiprocessor: threads,
        blocks_per_multiprocessor: blocks,
        registers: 65_536,
        shared_per_multiprocessor: shared << 10,
        shared_per_block_opt_in: opt_in << 10,
        shared_reserved: if capability.0 >= 8 { 1024 } else { 0 },
        shared_unit: if capability.0 >= 8 { 128 } else { 256 },
        l2_bytes: l2 << 20,
    }
}

/// The attributes of CUdevice_attribute that have a value here; numbers beyond the last known one are refused.
fn attribute(device: &Device, attribute: c_int) -> Answer<c_int> {
    let figures = figures(device);
    let value: u32 = match attribute {
        1 => MAX_THREADS,
        2..=4 => figures.max_block[(attribute - 2) as usize],
        5..=7 => figures.max_grid[(attribute - 5) as usize],
        8 => SHARED_WITHOUT_OPT_IN,      // MAX_SHARED_MEMORY_PER_BLOCK
        9 => 65_536,                     // TOTAL_CONSTANT_MEMORY
        10 => 32,                        // WARP_SIZE
        11 => i32::MAX as u32,           // MAX_PITCH
        12 | 82 => figures.registers,    // MAX_REGISTERS_PER_BLOCK, _PER_MULTIPROCESSOR
        13 => 1_000_000,                 // CLOCK_RATE in kHz: %clock64 counts nothing finer
        14 | 30 => 512,                  // TEXTURE_ALIGNMENT, SURFACE_ALIGNMENT
        15 | 31 => 1,                    // GPU_OVERLAP, CONCURRENT_KERNELS
        16 => figures.multiprocessors,   // MULTIPROCESSOR_COUNT
        19 | 41 => 1,                    // CAN_MAP_HOST_MEMORY, UNIFIED_ADDRESSING
        33 => device.ordinal as u32 + 1, // PCI_BUS_ID
        36 => 1_000_000,                 // MEMORY_CLOCK_RATE in kHz
        37 => 256,                       // GLOBAL_MEMORY_BUS_WIDTH
        38 => figures.l2_bytes,          // L2_CACHE_SIZE
        39 => figures.threads_per_multiprocessor,
        40 => 1,  // ASYNC_ENGINE_COUNT
        51 => 32, // TEXTURE_PITCH_ALIGNMENT
        75 => figures.capability.0,
        76 => figures.capability.1,
        78..=80 => 1, // STREAM_PRIORITIES, GLOBAL_L1, LOCAL_L1
        81 => figures.shared_per_multiprocessor,
        83 => 1,  // MANAGED_MEMORY
        86 => 0,  // HOST_NATIVE_ATOMIC
        87 => 64, // SINGLE_TO_DOUBLE_PRECISION_PERF_RATIO
        89 => 1,  // CONCURRENT_MANAGED_ACCESS
        90 => 1,  // COMPUTE_PREEMPTION
        91 => 0,  // CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM
        99 => 1,  // HOST_REGISTER_SUPPORTED
        95 => 1,  // COOPERATIVE_LAUNCH
        97 => figures.shared_per_block_opt_in,
        106 => figures.blocks_per_multiprocessor,
        111 => figures.shared_reserved, // RESERVED_SHARED_MEMORY_PER_BLOCK
        115 => 1,                       // MEMORY_POOLS_SUPPORTED
        // All others are texture limits, or features that this device lacks.
        17
        | 18
        | 20..=29
        | 32
        | 34
        | 35
        | 42..=50
        | 52..=74
        | 77
        | 84
        | 85
        | 88
        | 92..=94
        | 96
        | 98
        | 100..=105
        | 107..=110
        | 112..=114
        | 116..=161 => 0,
        _ => {
            return refuse(Code::INVALID_VALUE, format!("device attribute {attribute} is not known"));
        }
    };
    Ok(value as c_int)
}

/// The name of the emulated device, recognisable as such.
fn name(device: &Device) -> String {
    let (major, minor) = figures(device).capability;
    format!("PTX emulator sm_{major}{minor} #{}", device.ordinal)
}

/// The UUID: sixteen bytes that differ between devices.
fn uuid(ordinal: c_int) -> [u8; 16] {
    let mut bytes = *b"cuda_emu-device\0";
    bytes[15] = ordinal as u8;
    bytes
}

fn pci_bus_id(device: &Device) -> String {
    format!("0000:{:02X}:00.0", device.ordinal + 1)
}

/// Copies `string` with its terminator, cut to what fits.
///
/// # Safety
/// `place` is null or has `room` bytes.
unsafe fn give_string(place: *mut c_char, room: c_int, string: &str) -> Answer {
    if place.is_null() || room < 1 {
        return refuse(Code::INVALID_VALUE, "there is no room for the text");
    }
    let length = string.len().min(room as usize - 1);
    // SAFETY: guaranteed by the caller; `length` is below the room.
    unsafe {
        std::ptr::copy_nonoverlapping(string.as_ptr().cast(), place, length);
        place.add(length).write(0);
    }
    Ok(())
}

/// CUdevprop.
#[repr(C)]
pub struct Properties {
    max_threads_per_block: c_int,
    max_threads: [c_int; 3],
    max_grid: [c_int; 3],
    shared_per_block: c_int,
    constant_bytes: c_int,
    warp: c_int,
    pitch: c_int,
    registers_per_block: c_int,
    clock_khz: c_int,
    texture_alignment: c_int,
}

exports! { DEVICE:
    fn cuInit(flags: c_uint) {
        if flags != 0 {
            return refuse(Code::INVALID_VALUE, format!("the flags must be 0, not {flags:#x}"));
        }
        match init()?.devices.is_empty() {
            true => refuse(Code::NO_DEVICE, "CUDA_EMU_DEVICES is 0"),
            false => Ok(()),
        }
    }

    fn cuDriverGetVersion(version: *mut c_int) {
        give(version, DRIVER_VERSION, "the version")
    }

    fn cuDeviceGetCount(count: *mut c_int) {
        give(count, driver()?.devices.len() as c_int, "the count")
    }

    fn cuDeviceGet(device: *mut c_int, ordinal: c_int) {
        give(device, state::device(ordinal)?.ordinal, "the device")
    }

    fn cuDeviceGetName(name_out: *mut c_char, room: c_int, device: c_int) {
        give_string(name_out, room, &name(state::device(device)?))
    }

    fn cuDeviceGetUuid(id: *mut [u8; 16], device: c_int) {
        give(id, uuid(state::device(device)?.ordinal), "the id")
    }

    fn cuDeviceGetUuid_v2(id: *mut [u8; 16], device: c_int) {
        give(id, uuid(state::device(device)?.ordinal), "the id")
    }

    fn cuDeviceTotalMem_v2(bytes: *mut usize, device: c_int) {
        give(bytes, state::device(device)?.memory.limit() as usize, "the bytes")
    }

    fn cuDeviceGetAttribute(value: *mut c_int, number: c_int, device: c_int) {
        give(value, attribute(state::device(device)?, number)?, "the value")
    }

    fn cuDeviceComputeCapability(major: *mut c_int, minor: *mut c_int, device: c_int) {
        let capability = figures(state::device(device)?).capability;
        give(major, capability.0 as c_int, "the major version")?;
        give(minor, capability.1 as c_int, "the minor version")
    }

    fn cuDeviceGetProperties(properties: *mut Properties, device: c_int) {
        let device = state::device(device)?;
        let figures = figures(device);
        give(properties, Properties {
            max_threads_per_block: MAX_THREADS as c_int,
            max_threads: figures.max_block.map(|most| most as c_int),
            max_grid: figures.max_grid.map(|most| most as c_int),
            shared_per_block: SHARED_WITHOUT_OPT_IN as c_int,
            constant_bytes: attribute(device, 9)?,
            warp: attribute(device, 10)?,
            pitch: attribute(device, 11)?,
            registers_per_block: attribute(device, 12)?,
            clock_khz: attribute(device, 13)?,
            texture_alignment: attribute(device, 14)?,
        }, "the properties")
    }

    fn cuDeviceGetPCIBusId(id: *mut c_char, room: c_int, device: c_int) {
        give_string(id, room, &pci_bus_id(state::device(device)?))
    }

    fn cuDeviceGetByPCIBusId(device: *mut c_int, id: *const c_char) {
        let wanted = text(id, "the id")?;
        let found = driver()?.devices.iter().find(|device| pci_bus_id(device).eq_ignore_ascii_case(wanted));
        match found {
            Some(found) => give(device, found.ordinal, "the device"),
            None => refuse(Code::INVALID_DEVICE, format!("there is no device at {wanted}")),
        }
    }

    fn cuDeviceCanAccessPeer(able: *mut c_int, device: c_int, peer: c_int) {
        state::device(device)?;
        state::device(peer)?;
        give(able, 0, "the answer")
    }

    fn cuDeviceGetP2PAttribute(value: *mut c_int, number: c_int, from: c_int, to: c_int) {
        state::device(from)?;
        state::device(to)?;
        if !(1..=5).contains(&number) || from == to {
            let why = format!("there is no attribute {number} between devices {from} and {to}");
            return refuse(Code::INVALID_VALUE, why);
        }
        give(value, 0, "the value")
    }

    fn cuCtxEnablePeerAccess(context: state::Handle, flags: c_uint) {
        let _ = (context, flags);
        state::current()?;
        refuse(Code::PEER_ACCESS_UNSUPPORTED, "kernels cannot reach another device's memory: use cuMemcpyPeer")
    }

    fn cuCtxDisablePeerAccess(context: state::Handle) {
        let _ = context;
        state::current()?;
        refuse(Code::PEER_ACCESS_NOT_ENABLED, "access to the other device's memory was never enabled")
    }

    fn cuGetErrorName(code: Code, name: *mut *const c_char) {
        match code.name() {
            Some(found) => give(name, found.as_ptr(), "the name"),
            None => {
                give(name, std::ptr::null(), "the name")?;
                refuse(Code::INVALID_VALUE, format!("{} is no error code", code.0))
            }
        }
    }

    fn cuGetErrorString(code: Code, string: *mut *const c_char) {
        match code.text() {
            Some(found) => give(string, found.as_ptr(), "the text"),
            None => {
                give(string, std::ptr::null(), "the text")?;
                refuse(Code::INVALID_VALUE, format!("{} is no error code", code.0))
            }
        }
    }
}
